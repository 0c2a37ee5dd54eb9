/*
 * clients.c
 *		How long a client may take, byte by byte or in all.
 *
 * libmicrohttpd's own timeout starts anew with every byte, so that a client that
 * trickles could hold its connection for ever.  Here each phase of a connection has
 * --timeout seconds as a whole: until the headers of a request are there, until its
 * body is, until the answer has been taken, for which a long one has more.  While the
 * database works there is no limit here; database.c has it.  A thread looks every second and cuts connections
 * that are late; the thread that serves such a connection then sees it closed.
 *
 * One mutex guards the list and everything in it.  A socket is not closed before its
 * client has left the list, so what the thread cuts is never somebody else's.
 */
#include "gateway.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

/* So many bytes a second a client must take of an answer, beyond what --timeout allows. */
#define SLOWEST_READER		32768

struct Client
{
	int			fd;
	bool		tls;
	ClientPhase phase;
	time_t		deadline;		/* of now_seconds() */
	bool		late;
	Client	   *next;
	Client	   *previous;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t stop_wanted = PTHREAD_COND_INITIALIZER;
static Client *first = NULL;
static bool stopping = false;
static const Options *options = NULL;
static pthread_t thread;

static const char answer_408[] =
"HTTP/1.1 408 Request Timeout\r\n"
"Connection: close\r\n"
"Content-Type: application/problem+json\r\n"
"Content-Length: 62\r\n"
"\r\n"
"{\"type\":\"about:blank\",\"title\":\"Request Timeout\",\"status\":408}\n";

static time_t
now_seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec;
}

/* Under lock. */
static void
cut_off(Client *client)
{
	/*
	 * libmicrohttpd cannot answer a request that is not complete.  Nor is it sending
	 * anything while it waits for one, so we may.
	 */
	if (!client->tls && (client->phase == CLIENT_NEW || client->phase == CLIENT_SENDS))
		(void) !send(client->fd, answer_408, strlen(answer_408), MSG_DONTWAIT | MSG_NOSIGNAL);
	shutdown(client->fd, SHUT_RDWR);
	client->late = true;
}

static void *
watch_clients(void *arg)
{
	(void) arg;
	pthread_mutex_lock(&lock);
	while (!stopping)
	{
		struct timespec until;
		time_t		now = now_seconds();

		for (Client *client = first; client != NULL; client = client->next)
			if (!client->late && client->phase != CLIENT_WAITS && client->deadline < now)
				cut_off(client);
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec++;
		pthread_cond_timedwait(&stop_wanted, &lock, &until);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

bool
clients_start(const Options *opts)
{
	options = opts;
	return pthread_create(&thread, NULL, watch_clients, NULL) == 0;
}

void
clients_stop(void)
{
	pthread_mutex_lock(&lock);
	stopping = true;
	pthread_cond_signal(&stop_wanted);
	pthread_mutex_unlock(&lock);
	pthread_join(thread, NULL);
}

/* NULL: no memory; the connection then goes unwatched. */
Client *
client_create(int fd)
{
	Client	   *client = calloc(1, sizeof(Client));

	if (client == NULL)
		return NULL;
	client->fd = fd;
	client->tls = options->tls_cert != NULL;
	client->phase = CLIENT_NEW;
	client->deadline = now_seconds() + options->timeout;
	pthread_mutex_lock(&lock);
	client->next = first;
	if (first != NULL)
		first->previous = client;
	first = client;
	pthread_mutex_unlock(&lock);
	return client;
}

void
client_free(Client *client)
{
	if (client == NULL)
		return;
	pthread_mutex_lock(&lock);
	if (client->next != NULL)
		client->next->previous = client->previous;
	if (client->previous != NULL)
		client->previous->next = client->next;
	else
		first = client->next;
	pthread_mutex_unlock(&lock);
	free(client);
}

static void
begin_phase(Client *client, ClientPhase phase, int seconds)
{
	if (client == NULL)
		return;
	pthread_mutex_lock(&lock);
	client->phase = phase;
	client->deadline = now_seconds() + seconds;
	pthread_mutex_unlock(&lock);
}

/* A phase begins. */
void
client_begin(Client *client, ClientPhase phase)
{
	begin_phase(client, phase, options->timeout);
}

/* An answer is sent: a catalogue must get through a thin line, too. */
void
client_begin_reading(Client *client, size_t size)
{
	begin_phase(client, CLIENT_READS, options->timeout + (int) (size / SLOWEST_READER));
}

bool
client_is_late(Client *client)
{
	bool		late;

	if (client == NULL)
		return false;
	pthread_mutex_lock(&lock);
	late = client->late;
	pthread_mutex_unlock(&lock);
	return late;
}
