"""Methods: what is trained of a backbone, and how."""
