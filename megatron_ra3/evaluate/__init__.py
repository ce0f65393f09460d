"""Judging programs that models write: the jail they run in, the tasks they answer, and the verdicts on them.

Exists because a grader that runs in one process with the program it grades can be talked into a pass. Here the program
runs alone and only returns data (`sandbox`), and the comparison happens outside (`graders`).
"""
