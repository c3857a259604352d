"""Reports of other trainers' users, reproduced with the trainer's own package on a CPU, and what `oldlogits doctor` says."""
