"""The job's work spread over machines: by Ray, or as shards that are merged."""
