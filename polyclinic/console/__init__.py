"""Browser console of a researcher, a hospital or a coordinator: one small local web application.

It has no build step, sends no request to another host, and needs the extra ``console``. The process never imports
PyTorch: what needs it runs as a command in a child process.
"""
