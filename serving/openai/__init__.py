"""OpenAI's endpoints: what a request says, and how its answer is spelled."""
