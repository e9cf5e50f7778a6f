-- What wrk asks for: one request in five sends on the bus, so that each worker has NOTIFYs to send; the others only read.
local count = 0
function request()
    count = count + 1
    if count % 5 == 0 then
        return wrk.format("GET", "/other_listeners/send?message=" .. count)
    end
    return wrk.format("GET", "/other_listeners/read")
end
