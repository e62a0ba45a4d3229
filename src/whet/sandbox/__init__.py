"""Programs of others, run in processes that can change nothing: Linux namespaces, Landlock, seccomp, another user and limits."""
