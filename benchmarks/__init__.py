"""What HealthGPT costs: a checkpoint in each precision, the export at full size, a step of training."""
