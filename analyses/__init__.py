"""The paper's figures and tables on any model, our value beside the published one: `python -m analyses.NAME [--quick]`."""
