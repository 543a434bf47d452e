"""The ingress deployment, and the router to the replicas."""
