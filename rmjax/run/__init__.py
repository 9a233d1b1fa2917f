"""Training: stages, the loop, the step over devices, and what a workdir keeps."""
