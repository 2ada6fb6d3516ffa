"""What inspect shows: of a plan, a bundle or a run."""
