"""How records become batches: decoding, the image cache, crops, order."""
