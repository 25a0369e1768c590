"""Width: which channels go together, how much they matter, and a graph without some of them."""
