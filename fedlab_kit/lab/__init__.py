"""What a notebook imports last: plots, controls made from field metadata, and the workbench."""
