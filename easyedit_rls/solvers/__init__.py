"""Update rules in pure torch: keys, targets and a prior to a new weight. Nothing here knows a transformer."""
