"""moe_xe inside other libraries; each file needs its library only when its functions are called."""
