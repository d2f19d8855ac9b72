"""Soft anchors: second moments of ordinary keys, explicit pairs, and the prior that they make."""
