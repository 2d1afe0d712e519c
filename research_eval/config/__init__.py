"""The config of a run: JSON text -> checked values of every option. Importing the package does not import torch.

check         reads a file, a text or a dict, and returns an `ExperimentConfig`
jsonc         JSON with comments: values, and the line of each value
sections      the sections that every config has
signatures    the options of a model's or dataset's constructor as a pydantic model
construction  checks these options, and tries the construction
complaints    the report of all mistakes
json_schema   the JSON Schema for editors
"""
