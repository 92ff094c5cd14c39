"""`distrec manifest`: a verb with its config as manifests for Kubernetes, which `kubectl apply -k` starts."""
