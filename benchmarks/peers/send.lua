-- wrk -s send.lua URL -- FILE: posts the bytes of a file; headers are wrk's -H.
function init(args)
   local file = assert(io.open(args[1], "rb"))
   wrk.method = "POST"
   wrk.body = file:read("*a")
   file:close()
end
