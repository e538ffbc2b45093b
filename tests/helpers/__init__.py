"""What several tests use: tiny models, datasets in every format, small runs, jobs that are killed."""
