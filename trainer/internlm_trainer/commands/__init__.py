"""The subcommands of `internlm`, a module a topic; none of them imports torch before it runs."""
