# exec: the signal is for the service.
exec python with_aiohttp.py
