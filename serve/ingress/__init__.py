"""The ingress and the router to the replicas."""
