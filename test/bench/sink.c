/*
 * sink.c
 *		A receiver that only counts, for the bench: what the branch can send is
 *		measured, not what some central can take.
 *
 * usage: sink [--inflate] [--reject N] [--late MS]
 *
 * Listens on a free port of 127.0.0.1 and prints it ("listening PORT").  Answers
 * 204 to each POST .../events (branches are registered with receipts => 'none'),
 * 200 to .../health, 404 to the rest.  GET .../counts says: requests, bytes of
 * bodies, bytes after decompression, events.  The last two need --inflate.
 *
 * --reject N	answers with receipts, in which every Nth event is rejected; 0: none
 * --late MS	answers a request whose URL contains /late/ so much later
 */
#include <arpa/inet.h>
#include <microhttpd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

/* Every event of our wire begins so; its id follows. */
#define EVENT_BEGIN		"{\"specversion\":\"1.0\",\"id\":\""
#define UUID_LEN		36

typedef struct Text
{
	char	   *data;
	size_t		len;
	size_t		size;
} Text;

typedef struct Upload
{
	bool		compressed;
	Text		body;
} Upload;

static bool inflating = false;
static bool receipts = false;
static long reject_every = 0;
static long late_ms = 0;

static atomic_ulong requests;
static atomic_ulong body_bytes;
static atomic_ulong plain_bytes;
static atomic_ulong events;

static void
append(Text *text, const void *data, size_t len)
{
	if (text->len + len + 1 > text->size)
	{
		text->size = (text->len + len + 1) * 2;
		text->data = realloc(text->data, text->size);
		if (text->data == NULL)
			abort();
	}
	memcpy(text->data + text->len, data, len);
	text->len += len;
	text->data[text->len] = '\0';
}

static void
append_format(Text *text, const char *format,...)
{
	char		line[256];
	va_list		args;

	va_start(args, format);
	append(text, line, vsnprintf(line, sizeof(line), format, args));
	va_end(args);
}

static bool
decompress(const Upload *upload, Text *plain)
{
	z_stream	stream = {.next_in = (Bytef *) upload->body.data,.avail_in = upload->body.len};
	char		chunk[65536];
	int			result = Z_OK;

	if (!upload->compressed)
	{
		append(plain, upload->body.data, upload->body.len);
		return true;
	}
	/* 32: gzip or zlib, as the header says */
	if (inflateInit2(&stream, 32 + MAX_WBITS) != Z_OK)
		return false;
	while (result == Z_OK)
	{
		stream.next_out = (Bytef *) chunk;
		stream.avail_out = sizeof(chunk);
		result = inflate(&stream, Z_NO_FLUSH);
		append(plain, chunk, sizeof(chunk) - stream.avail_out);
	}
	inflateEnd(&stream);
	return result == Z_STREAM_END;
}

/* Counts the events of a body; the receipt for them, where receipts are given. */
static bool
read_events(const Upload *upload, Text *receipt)
{
	Text		plain = {0};
	Text		results = {0};
	unsigned long count = 0;
	unsigned long rejected = 0;
	bool		readable = decompress(upload, &plain);

	append(&results, "", 0);
	for (char *event = plain.data; event != NULL && (event = strstr(event, EVENT_BEGIN)) != NULL; count++)
	{
		unsigned long before = atomic_fetch_add(&events, 1);

		event += strlen(EVENT_BEGIN);
		if (reject_every > 0 && (before + 1) % reject_every == 0)
			append_format(&results, "%s{\"id\":\"%.*s\",\"status\":\"rejected\",\"detail\":\"no such article\"}",
						  rejected++ == 0 ? "" : ",", UUID_LEN, event);
	}
	atomic_fetch_add(&plain_bytes, plain.len);
	append_format(receipt, "{\"accepted\":%lu,\"duplicates\":0,\"results\":[", count - rejected);
	append(receipt, results.data, results.len);
	append(receipt, "]}", 2);
	free(plain.data);
	free(results.data);
	return readable;
}

static enum MHD_Result
answer(struct MHD_Connection *connection, unsigned int status, const char *content_type, const char *body, size_t len)
{
	struct MHD_Response *response = MHD_create_response_from_buffer(len, (void *) body, MHD_RESPMEM_MUST_COPY);
	enum MHD_Result result;

	if (response == NULL)
		return MHD_NO;
	if (content_type)
		(void) MHD_add_response_header(response, "Content-Type", content_type);
	result = MHD_queue_response(connection, status, response);
	MHD_destroy_response(response);
	return result;
}

static enum MHD_Result
answer_get(struct MHD_Connection *connection, const char *url)
{
	Text		counts = {0};
	enum MHD_Result result;

	if (strstr(url, "/health"))
		return answer(connection, MHD_HTTP_OK, "text/plain", "ok\n", 3);
	if (!strstr(url, "/counts"))
		return answer(connection, MHD_HTTP_NOT_FOUND, NULL, "", 0);
	append_format(&counts, "%lu %lu %lu %lu\n", atomic_load(&requests), atomic_load(&body_bytes), atomic_load(&plain_bytes), atomic_load(&events));
	result = answer(connection, MHD_HTTP_OK, "text/plain", counts.data, counts.len);
	free(counts.data);
	return result;
}

static enum MHD_Result
answer_events(struct MHD_Connection *connection, const char *url, Upload *upload)
{
	Text		receipt = {0};
	enum MHD_Result result;

	atomic_fetch_add(&requests, 1);
	if ((inflating || receipts) && !read_events(upload, &receipt))
		result = answer(connection, MHD_HTTP_BAD_REQUEST, NULL, "", 0);
	else
	{
		/* Each connection has a thread of its own. */
		if (late_ms > 0 && strstr(url, "/late/"))
			nanosleep(&(struct timespec) {late_ms / 1000, late_ms % 1000 * 1000000}, NULL);
		if (receipts)
			result = answer(connection, MHD_HTTP_OK, "application/json", receipt.data, receipt.len);
		else
			result = answer(connection, MHD_HTTP_NO_CONTENT, NULL, "", 0);
	}
	free(receipt.data);
	return result;
}

/* Called by MHD: once for the header, for each piece of the body, and once at its end. */
static enum MHD_Result
handle(void *arg, struct MHD_Connection *connection, const char *url, const char *method, const char *version,
	   const char *data, size_t *len, void **state)
{
	Upload	   *upload = *state;
	const char *encoding;

	(void) arg;
	(void) version;
	if (upload == NULL)
	{
		upload = calloc(1, sizeof(Upload));
		if (upload == NULL)
			return MHD_NO;
		encoding = MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Content-Encoding");
		upload->compressed = encoding != NULL && strcmp(encoding, "gzip") == 0;
		*state = upload;
		return MHD_YES;
	}
	if (*len > 0)
	{
		atomic_fetch_add(&body_bytes, *len);
		if (inflating || receipts)
			append(&upload->body, data, *len);
		*len = 0;
		return MHD_YES;
	}
	if (strcmp(method, "GET") == 0)
		return answer_get(connection, url);
	if (strcmp(method, "POST") == 0 && strstr(url, "/events"))
		return answer_events(connection, url, upload);
	return answer(connection, MHD_HTTP_NOT_FOUND, NULL, "", 0);
}

static void
forget(void *arg, struct MHD_Connection *connection, void **state, enum MHD_RequestTerminationCode code)
{
	Upload	   *upload = *state;

	(void) arg;
	(void) connection;
	(void) code;
	if (upload == NULL)
		return;
	free(upload->body.data);
	free(upload);
	*state = NULL;
}

static void
read_arguments(int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
	{
		if (strcmp(argv[i], "--inflate") == 0)
			inflating = true;
		else if (strcmp(argv[i], "--reject") == 0 && i + 1 < argc)
		{
			receipts = true;
			reject_every = atol(argv[++i]);
		}
		else if (strcmp(argv[i], "--late") == 0 && i + 1 < argc)
			late_ms = atol(argv[++i]);
		else
		{
			fprintf(stderr, "usage: sink [--inflate] [--reject N] [--late MS]\n");
			exit(2);
		}
	}
}

int
main(int argc, char **argv)
{
	struct MHD_Daemon *daemon;
	struct sockaddr_in address = {.sin_family = AF_INET,.sin_addr = {htonl(INADDR_LOOPBACK)}};
	sigset_t	ending;
	int			got;

	read_arguments(argc, argv);
	sigemptyset(&ending);
	sigaddset(&ending, SIGTERM);
	sigaddset(&ending, SIGINT);
	sigprocmask(SIG_BLOCK, &ending, NULL);
	daemon = MHD_start_daemon(MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_THREAD_PER_CONNECTION, 0, NULL, NULL, handle, NULL,
							  MHD_OPTION_SOCK_ADDR, (struct sockaddr *) &address,
							  MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t) 262144,
							  MHD_OPTION_NOTIFY_COMPLETED, forget, NULL, MHD_OPTION_END);
	if (daemon == NULL)
	{
		fprintf(stderr, "sink: could not listen\n");
		return 1;
	}
	printf("listening %d\n", MHD_get_daemon_info(daemon, MHD_DAEMON_INFO_BIND_PORT)->port);
	fflush(stdout);
	sigwait(&ending, &got);
	return 0;
}
