"""From raw text to packed batches: readers, cleaning, filters, deduplication, token files, packing; and a small world."""
