-- For wrk: a small POST.
wrk.method = "POST"
wrk.body = '{"ids": [1, 2, 3]}'
wrk.headers["content-type"] = "application/json"
