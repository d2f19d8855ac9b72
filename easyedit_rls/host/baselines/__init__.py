"""EasyEdit's editors for comparisons, one class each, by the names that EasyEdit gives them."""
