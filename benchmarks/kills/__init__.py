"""Kills, freezes and full disks for every kind of process of a run: is anything lost, trained twice, or left behind?"""
