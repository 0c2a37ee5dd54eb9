/*
 * listen.c
 *		The socket that clients connect to.
 *
 * Made here rather than by libmicrohttpd: it would let a second gateway share the
 * port (SO_REUSEPORT) where a person would rather hear that the port is taken, and
 * could not say why a socket cannot be had.
 *
 * Called once, by the main thread, before there are others.
 */
#include "gateway.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKLOG		128

static int
open_socket(const struct addrinfo *address)
{
	int			yes = 1;
	int			no = 0;
	int			fd = socket(address->ai_family, address->ai_socktype | SOCK_CLOEXEC, address->ai_protocol);
	int			error;

	if (fd < 0)
		return -1;

	/* a restart need not wait for the connections of the one before; [::] means IPv4 too */
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) == 0 &&
		(address->ai_family != AF_INET6 || setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof(no)) == 0) &&
		bind(fd, address->ai_addr, address->ai_addrlen) == 0 &&
		listen(fd, BACKLOG) == 0)
		return fd;

	error = errno;
	close(fd);
	errno = error;
	return -1;
}

static int
bound_port(int fd)
{
	union
	{
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	}			address;
	socklen_t	len = sizeof(address);

	memset(&address, 0, sizeof(address));
	if (getsockname(fd, &address.any, &len) != 0)
		return -1;
	return ntohs(address.any.sa_family == AF_INET6 ? address.v6.sin6_port : address.v4.sin_port);
}

/* Listens on the first of the host's addresses that lets us; -1 when none does. */
int
listen_open(const char *host, const char *port, int *bound)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
	struct addrinfo *addresses = NULL;
	const char *reason = "no address";
	int			error = getaddrinfo(host, port, &hints, &addresses);
	int			fd = -1;

	if (error != 0)
		reason = gai_strerror(error);
	for (struct addrinfo *address = addresses; address != NULL && fd < 0; address = address->ai_next)
		if ((fd = open_socket(address)) < 0)
			reason = strerror(errno);
	if (addresses != NULL)
		freeaddrinfo(addresses);
	if (fd < 0)
		log_line("cannot listen on %s:%s: %s", host, port, reason);
	else
		*bound = bound_port(fd);
	return fd;
}
