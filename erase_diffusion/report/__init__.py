"""Results as a person reads them. Knows no model."""
