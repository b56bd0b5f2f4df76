"""A room of learners on one engine: a front that gives each a key and a fair share, and JupyterHub for their desks.

`front` stands between the learners and vLLM (`keys`: who may, `limits`: how much); `hub` keeps JupyterHub and its
proxy; `admin` is the instructor's way to the front, and `load` puts a whole room on it at once.
"""
