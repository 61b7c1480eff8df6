"""The cloud: any recipe behind HTTP, in a process of its own."""
