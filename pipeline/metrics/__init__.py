"""The field's measures of masks against ground truth."""
