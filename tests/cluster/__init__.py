"""Pretend hosts, and a SLURM on them: see hosts.sh and slurm.sh."""
