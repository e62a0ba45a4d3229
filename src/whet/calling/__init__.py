"""Calls of users' functions: global state is restored, a slow one is named, and a limit of time ends one."""
