"""The prepared dataset: format, importers, splits, global sample order and negatives."""
