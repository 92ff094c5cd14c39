"""`distrec submit`: run a verb as a job of a Ray cluster, through Ray's own job client."""
