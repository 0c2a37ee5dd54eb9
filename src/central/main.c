/*
 * main.c
 *		softmobile-gateway: takes batches of events over HTTP and stores them by
 *		softmobile.central_receive().
 *
 * Stateless: any number may run side by side behind a load balancer, and one that
 * is stopped or killed loses nothing, for a receipt is sent only after the batch
 * is committed, and a branch sends again what it has no receipt for.
 */
#include "gateway.h"

#include <getopt.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char usage[] =
"softmobile-gateway takes events of branches for a central PostgreSQL server.\n"
"\n"
"  --listen HOST:PORT            where to listen (127.0.0.1:8080; port 0: any)\n"
"  --database CONNINFO           libpq connection string ('': from PG* variables)\n"
"  --connections N               database connections (8), and one for health\n"
"  --clients N                   HTTP connections at once (512)\n"
"  --connections-per-address N   of them from one address (64; more behind a proxy)\n"
"  --max-body SIZE               largest body, as it is sent (64MB)\n"
"  --max-unpacked SIZE           largest body after decompression (128MB)\n"
"  --max-memory SIZE             all bodies together (512MB)\n"
"  --timeout SECONDS             for a client to send, for the database to store (30)\n"
"  --tls-cert FILE               certificate chain, PEM\n"
"  --tls-key FILE                its private key, PEM\n"
"  --signing-keys FILE           take signed bodies only: a key on each line, as branches have them\n"
"  --help, --version\n";

static int
number_argument(const char *name, const char *text, int min, int max)
{
	char	   *end;
	long		value = strtol(text, &end, 10);

	if (*text == '\0' || *end != '\0' || value < min || value > max)
	{
		fprintf(stderr, "softmobile-gateway: --%s takes a number from %d to %d\n", name, min, max);
		exit(2);
	}
	return (int) value;
}

/* As in postgresql.conf: kB, MB or GB; MB without a unit. */
static size_t
size_argument(const char *name, const char *text, size_t max_mb)
{
	static const struct
	{
		const char *name;
		size_t		bytes;
	}			units[] = {{"", 1 << 20}, {"kB", 1 << 10}, {"MB", 1 << 20}, {"GB", 1 << 30}};
	char	   *unit;
	unsigned long value = strtoul(text, &unit, 10);

	/* strtoul() takes a sign */
	if (*text >= '0' && *text <= '9' && value > 0)
		for (size_t i = 0; i < sizeof(units) / sizeof(units[0]); i++)
			if (strcmp(unit, units[i].name) == 0 && value <= (max_mb << 20) / units[i].bytes)
				return value * units[i].bytes;
	fprintf(stderr, "softmobile-gateway: --%s takes a size from 1kB to %zuMB, such as 64MB\n", name, max_mb);
	exit(2);
}

/* HOST:PORT or [HOST]:PORT */
static void
parse_listen(char *text, Options *options)
{
	char	   *colon = strrchr(text, ':');

	if (colon == NULL || colon == text || colon[1] == '\0')
	{
		fprintf(stderr, "softmobile-gateway: --listen takes HOST:PORT\n");
		exit(2);
	}
	*colon = '\0';
	if (text[0] == '[' && colon[-1] == ']')
	{
		colon[-1] = '\0';
		text++;
	}
	options->host = text;
	options->port = colon + 1;
	(void) number_argument("listen's port", options->port, 0, 65535);
}

static void
parse_options(int argc, char **argv, Options *options)
{
	static const struct option known[] = {
		{"listen", required_argument, NULL, 'l'},
		{"database", required_argument, NULL, 'd'},
		{"connections", required_argument, NULL, 'c'},
		{"clients", required_argument, NULL, 'n'},
		{"connections-per-address", required_argument, NULL, 'a'},
		{"max-body", required_argument, NULL, 'b'},
		{"max-unpacked", required_argument, NULL, 'u'},
		{"max-memory", required_argument, NULL, 'm'},
		{"timeout", required_argument, NULL, 't'},
		{"tls-cert", required_argument, NULL, 'C'},
		{"tls-key", required_argument, NULL, 'K'},
		{"signing-keys", required_argument, NULL, 's'},
		{"help", no_argument, NULL, 'h'},
		{"version", no_argument, NULL, 'v'},
		{NULL, 0, NULL, 0}
	};
	int			option;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
		switch (option)
		{
			case 'l':
				parse_listen(optarg, options);
				break;
			case 'd':
				options->database = optarg;
				break;
			case 'c':
				options->connections = number_argument("connections", optarg, 1, 1000);
				break;
			case 'n':
				options->clients = number_argument("clients", optarg, 1, 100000);
				break;
			case 'a':
				options->clients_per_address = number_argument("connections-per-address", optarg, 1, 100000);
				break;
			case 'b':
				options->max_body = size_argument("max-body", optarg, 1000);
				break;
			case 'u':
				options->max_unpacked = size_argument("max-unpacked", optarg, 1000);
				break;
			case 'm':
				options->max_memory = size_argument("max-memory", optarg, 1000000);
				break;
			case 't':
				options->timeout = number_argument("timeout", optarg, 1, 3600);
				break;
			case 'C':
				options->tls_cert = optarg;
				break;
			case 'K':
				options->tls_key = optarg;
				break;
			case 's':
				options->signing_keys = optarg;
				break;
			case 'h':
				fputs(usage, stdout);
				exit(0);
			case 'v':
				puts("softmobile-gateway " SOFTMOBILE_VERSION);
				exit(0);
			default:
				fputs("Try --help.\n", stderr);
				exit(2);
		}
	if (optind < argc)
	{
		fprintf(stderr, "softmobile-gateway: what is \"%s\"? Try --help.\n", argv[optind]);
		exit(2);
	}
	if ((options->tls_cert == NULL) != (options->tls_key == NULL))
	{
		fprintf(stderr, "softmobile-gateway: --tls-cert and --tls-key go together\n");
		exit(2);
	}
}

int
main(int argc, char **argv)
{
	Options		options = {
		.host = "127.0.0.1", .port = "8080", .database = "", .connections = 8, .clients = 512,
		.clients_per_address = 64, .max_body = 64 * 1024 * 1024,
		.max_unpacked = 128 * 1024 * 1024, .max_memory = 512 * 1024 * 1024, .timeout = 30
	};
	sigset_t	ending;
	int			signal_number;
	int			port;
	bool		finished;

	parse_options(argc, argv, &options);
	signal(SIGPIPE, SIG_IGN);

	/* Blocked in all threads: the main thread waits for them below. */
	sigemptyset(&ending);
	sigaddset(&ending, SIGTERM);
	sigaddset(&ending, SIGINT);
	pthread_sigmask(SIG_BLOCK, &ending, NULL);

	if (!signature_init(&options) || !pool_start(&options) || !health_start(&options) || !server_start(&options, &port))
		return 1;
	printf(strchr(options.host, ':') ? "listening on [%s]:%d\n" : "listening on %s:%d\n", options.host, port);
	fflush(stdout);

	sigwait(&ending, &signal_number);
	log_line("ending: no more requests are taken");
	finished = server_stop(options.timeout);
	finished = health_stop() && finished;
	if (!finished)
	{
		/* Threads still run: nothing may be torn down under them, and nothing needs to be. */
		log_line("ending with requests unfinished: their senders get no receipt and send again");
		_exit(0);
	}
	pool_stop();
	return 0;
}
