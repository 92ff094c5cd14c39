"""Row-partitioned sparse graphs: local products, exchange of boundary rows, user-item and nearest-neighbour graphs."""
