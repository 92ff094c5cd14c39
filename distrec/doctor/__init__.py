"""`distrec doctor`: looks for what would go wrong on this machine and on a cluster, before anything is started."""
