//! A client of XAPI, the interface of XCP-ng and XenServer pools: blocking, with a token to stop whatever waits.
