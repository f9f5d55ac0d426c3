"""What networks are trained to do: objectives and their losses."""
