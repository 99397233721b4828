"""Whether a GPU gives the CPU's numbers, and how fast and in how much memory it aligns SD3.5-medium."""
