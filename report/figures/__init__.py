"""The pictures of a report, each of them a pure function of artifacts."""
