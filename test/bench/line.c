/*
 * line.c
 *		A thin, long line to the receiver, for the bench: what goes in comes out
 *		later, and not faster than the line is.
 *
 * usage: line PORT [DELAY_MS [BYTES_PER_SECOND]]
 *
 * Listens on a free port of 127.0.0.1, prints it ("listening PORT"), and passes
 * connections on to PORT.  DELAY_MS is one way.  BYTES_PER_SECOND is what each
 * direction carries, for all connections together; 0: whatever comes.  A
 * connection that is new costs a round trip more, as the real handshake would.
 * Ended with SIGTERM it prints the bytes that went up and down.
 *
 * A sender feels the line as backpressure: what has not left the near end yet is
 * at most a queue's worth, as in a router with a queue of that size; nothing is
 * lost.  TCP's slow start is not imitated.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS		256
#define MAX_PACKET			1448
/* Sockets' own buffers, kept small so that the queue below is what counts. */
#define SOCKET_BUFFER		16384

typedef struct Packet
{
	struct Packet *next;
	int64_t		leaves_at;		/* in the near end until then */
	int64_t		arrives_at;
	size_t		len;
	size_t		written;
	char		data[MAX_PACKET];
} Packet;

/* One direction of one connection. */
typedef struct Flow
{
	int			from;
	int			to;
	bool		ended;			/* from has no more */
	bool		closed;			/* and to knows */
	int64_t		not_before;		/* the handshake */
	Packet	   *first;
	Packet	   *last;
} Flow;

typedef struct Connection
{
	bool		used;
	Flow		flows[2];
} Connection;

/* The two directions of the line, shared by all connections. */
typedef struct Lane
{
	int64_t		free_at;		/* when all that was taken in has left the near end */
	uint64_t	bytes;
} Lane;

static Connection connections[MAX_CONNECTIONS];
static Lane lanes[2];
static int64_t delay_ns = 0;
static int64_t rate = 0;
static int64_t queue_ns;
static size_t packet_size = MAX_PACKET;
static volatile sig_atomic_t ending = 0;

static void
end(int signal_number)
{
	(void) signal_number;
	ending = 1;
}

static int64_t
now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int
die(const char *what)
{
	perror(what);
	exit(1);
}

static void
bound_buffers(int fd)
{
	int			size = SOCKET_BUFFER;

	if (rate > 0 && rate < size)
		size = 1;				/* the least that the system allows */
	(void) setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	(void) setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
}

static void
open_connection(int listener, int target)
{
	struct sockaddr_in address = {.sin_family = AF_INET,.sin_port = htons(target),.sin_addr = {htonl(INADDR_LOOPBACK)}};
	Connection *connection = NULL;
	int			near = accept(listener, NULL, NULL);
	int			far;

	if (near < 0)
		return;
	for (int i = 0; i < MAX_CONNECTIONS && connection == NULL; i++)
		if (!connections[i].used)
			connection = &connections[i];
	far = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connection == NULL || far < 0 || connect(far, (struct sockaddr *) &address, sizeof(address)) != 0)
	{
		close(near);
		if (far >= 0)
			close(far);
		return;
	}
	bound_buffers(near);
	*connection = (Connection) {
		.used = true,
		.flows = {{.from = near,.to = far,.not_before = now_ns() + 3 * delay_ns}, {.from = far,.to = near}}
	};
}

static void
close_connection(Connection *connection)
{
	for (int i = 0; i < 2; i++)
	{
		for (Packet *packet = connection->flows[i].first; packet;)
		{
			Packet	   *next = packet->next;

			free(packet);
			packet = next;
		}
		close(connection->flows[i].from);
	}
	connection->used = false;
}

/* false: the connection is broken */
static bool
take_in(Flow *flow, Lane *lane)
{
	Packet	   *packet = malloc(sizeof(Packet));
	ssize_t		got;
	int64_t		now = now_ns();

	if (packet == NULL)
		die("malloc");
	got = recv(flow->from, packet->data, packet_size, MSG_DONTWAIT);
	if (got <= 0)
	{
		free(packet);
		flow->ended = got == 0;
		return got == 0 || errno == EAGAIN || errno == EINTR;
	}
	lane->bytes += got;
	if (lane->free_at < now)
		lane->free_at = now;
	if (rate > 0)
		lane->free_at += got * INT64_C(1000000000) / rate;
	packet->next = NULL;
	packet->len = got;
	packet->written = 0;
	packet->leaves_at = lane->free_at;
	packet->arrives_at = lane->free_at + delay_ns;
	if (packet->arrives_at < flow->not_before)
		packet->arrives_at = flow->not_before;
	if (flow->first == NULL)
		flow->first = packet;
	else
		flow->last->next = packet;
	flow->last = packet;
	return true;
}

/* false: the connection is broken */
static bool
bring_out(Flow *flow, int64_t now)
{
	Packet	   *packet;

	while ((packet = flow->first) != NULL && packet->arrives_at <= now)
	{
		ssize_t		put = send(flow->to, packet->data + packet->written, packet->len - packet->written, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (put < 0)
			return errno == EAGAIN || errno == EINTR;
		packet->written += put;
		if (packet->written < packet->len)
			return true;
		flow->first = packet->next;
		free(packet);
	}
	if (flow->first == NULL && flow->ended && !flow->closed)
	{
		flow->closed = true;
		(void) shutdown(flow->to, SHUT_WR);
	}
	return true;
}

/* Waits for whatever is next. */
static void
wait_for_work(int listener)
{
	struct pollfd polled[1 + 4 * MAX_CONNECTIONS];
	int			count = 0;
	int64_t		now = now_ns();
	int64_t		wake = now + INT64_C(1000000000);
	struct timespec timeout;

	polled[count++] = (struct pollfd) {.fd = listener,.events = POLLIN};
	for (int i = 0; i < MAX_CONNECTIONS; i++)
	{
		for (int way = 0; connections[i].used && way < 2; way++)
		{
			Flow	   *flow = &connections[i].flows[way];

			if (flow->first && flow->first->arrives_at <= now)
				polled[count++] = (struct pollfd) {.fd = flow->to,.events = POLLOUT};
			else if (flow->first && flow->first->arrives_at < wake)
				wake = flow->first->arrives_at;
			if (flow->ended)
				continue;
			if (lanes[way].free_at <= now + queue_ns)
				polled[count++] = (struct pollfd) {.fd = flow->from,.events = POLLIN};
			else if (lanes[way].free_at - queue_ns < wake)
				wake = lanes[way].free_at - queue_ns;
		}
	}
	timeout = (struct timespec) {(wake - now) / 1000000000, (wake - now) % 1000000000};
	(void) ppoll(polled, count, &timeout, NULL);
}

static void
pass_on(void)
{
	for (int i = 0; i < MAX_CONNECTIONS; i++)
	{
		Connection *connection = &connections[i];
		bool		whole = true;

		if (!connection->used)
			continue;
		for (int way = 0; way < 2; way++)
		{
			Flow	   *flow = &connection->flows[way];
			int64_t		now = now_ns();

			if (!flow->ended && lanes[way].free_at <= now + queue_ns)
				whole &= take_in(flow, &lanes[way]);
			whole &= bring_out(flow, now_ns());
		}
		if (!whole || (connection->flows[0].closed && connection->flows[1].closed))
			close_connection(connection);
	}
}

int
main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET,.sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t	len = sizeof(address);
	int			listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sigaction action = {.sa_handler = end};

	if (argc < 2 || argc > 4)
	{
		fprintf(stderr, "usage: line PORT [DELAY_MS [BYTES_PER_SECOND]]\n");
		return 2;
	}
	if (argc > 2)
		delay_ns = atol(argv[2]) * INT64_C(1000000);
	if (argc > 3)
		rate = atol(argv[3]);
	/* A queue of 100 ms; a line of a byte a second is to hold no more than a byte. */
	queue_ns = INT64_C(100000000);
	if (rate > 0 && rate / 20 < MAX_PACKET)
		packet_size = rate / 20 > 1 ? rate / 20 : 1;

	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGINT, &action, NULL);
	bound_buffers(listener);
	if (bind(listener, (struct sockaddr *) &address, sizeof(address)) != 0 || listen(listener, 64) != 0 ||
		getsockname(listener, (struct sockaddr *) &address, &len) != 0)
		die("line");
	printf("listening %d\n", ntohs(address.sin_port));
	fflush(stdout);
	while (!ending)
	{
		struct pollfd waiting = {.fd = listener,.events = POLLIN};

		wait_for_work(listener);
		while (poll(&waiting, 1, 0) == 1 && (waiting.revents & POLLIN))
			open_connection(listener, atoi(argv[1]));
		pass_on();
	}
	printf("%llu %llu\n", (unsigned long long) lanes[0].bytes, (unsigned long long) lanes[1].bytes);
	return 0;
}
