"""When to pay: wrappers that take the full method only at some steps."""
