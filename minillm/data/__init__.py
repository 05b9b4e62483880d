"""From raw text to packed batches: readers, cleaning, filters, deduplication, token files, packing; a small world."""
