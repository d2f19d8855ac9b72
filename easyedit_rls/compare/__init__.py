"""Side-by-side runs: the same stream of edits through several editors, each in a process of its own."""
