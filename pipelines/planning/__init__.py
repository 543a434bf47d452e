"""Planning: from options to a plan in which everything is checked and resolved."""
