"""What commands open and build from their options: data, models, batches, validation."""
