"""Row-partitioned sparse graphs: local products, exchanges of boundary rows, user-item and nearest-neighbour graphs."""
